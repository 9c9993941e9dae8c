"""The computations that are ours alone.

The code lives in the top-level folder ``kernels/`` and is installed as sub-packages of this one
(``setup.cfg``, ``package_dir``).  That folder has no ``__init__.py``: as an importable ``kernels``
it would shadow the Hugging Face package of that name, which transformers imports.
"""
