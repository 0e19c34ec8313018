"""Nearest neighbours among the rows of a memory bank: exact (`exact.py`), or by an index of faiss (`approximate.py`)."""
