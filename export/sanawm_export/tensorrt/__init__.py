"""TensorRT-RTX and TensorRT engines: graphs lowered, built, audited and bundled on machines without a GPU."""
