"""Is it fast: the cases of the contract at named sizes, against what the memory of the same machine does."""
