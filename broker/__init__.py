"""The meeting point: the topic tree, the messages, the aggregator service."""
