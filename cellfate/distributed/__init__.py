"""Work in chunks: on one process or on many through Dask, with what is finished kept in a folder."""
