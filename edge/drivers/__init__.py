"""One file a protocol; one contract, one conformance suite over all."""
