"""Shared code of the packages: files, validation, keys, the backend. Not public: it may change in any release."""
