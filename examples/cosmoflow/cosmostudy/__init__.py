"""CosmoFlow on whole volumes and on cubes cut from them: the study behind `examples/cosmoflow/run`."""
