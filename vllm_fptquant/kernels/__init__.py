"""Kernels that exist already, behind one small interface (`base.py`); `select.py` chooses among them."""
