"""What people read: reports of a ledger, forecasts of a plan; text and pages.

Nothing here trains, and every epsilon is `dptrain.privacy.accounting`'s.
"""
