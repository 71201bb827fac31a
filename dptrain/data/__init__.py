"""From a corpus of text to masked, fixed-shape batches of token records.

In the order in which data flows:

* `seqio_import`: brings in seqio and TensorFlow, late and quietly.
* `corpus`: reads the documents of any registered seqio task or mixture.
* `special_tokens`: the ids of [PAD], [UNK], [CLS], [SEP] and [MASK].
* `vocabulary`: trains, saves and loads a SentencePiece vocabulary.
* `store`: cuts documents into records, the units of privacy.
* `units`: documents and users, with a bounded contribution.
* `prepare`, `shards`: write such a store to disk, once; `prepared` reads it.
* `batches`: physical batches of one static shape.
* `prefetch`: makes what comes next while the caller is busy.
* `masking`: BERT masking inside the jitted step.

The seqio tasks themselves are in `dptrain.tasks`.
"""
