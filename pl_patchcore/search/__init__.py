"""Ways of search beside the plain product of `memory_bank.py`: a filter of small integers, indexes of faiss."""
