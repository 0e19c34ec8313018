"""Nearest neighbours in a memory bank: exact (`exact.py`), or by an index of faiss (`approximate.py`)."""
