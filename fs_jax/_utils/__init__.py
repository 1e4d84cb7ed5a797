"""What several rooms need: files, validation, keys, the backend. Not public: it may change in any release."""
