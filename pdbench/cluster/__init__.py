"""More than one host: the interface of pdbench/site.py over a Ray cluster. Ray is imported when --cluster is given."""
