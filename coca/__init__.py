"""CoCa: the data contract, the model and its training, without Ray."""
