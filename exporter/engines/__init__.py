"""One file a backend, all behind the interface of base.py."""
