"""The exit handler: what the run did, why it failed, what it cost."""
