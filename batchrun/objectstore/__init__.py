"""Files that are objects in a store, named by URL: `s3://bucket/rows.parquet`."""
