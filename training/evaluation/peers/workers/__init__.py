"""What runs inside the processes of peers; see `serve.py`."""
