"""A few new weights beside a frozen model: put in, trained, switched, merged in, given away.

``slots`` and ``base`` are where they sit and what all methods share, ``targets`` finds the layers.
Then a method each: ``lora``, ``dora``, ``relora``, ``adalora``, ``ia3``, ``bitfit``,
``bottleneck``, ``prefix``, ``prompt``; ``tokens`` for single rows of the embedding. ``packed`` and
``nf4`` keep the base in four bits, ``io`` and ``peft_fields`` write and read PEFT's directories,
``opening`` opens any of them. Several at once: ``rows``, ``vectors``, ``combine``.
"""
