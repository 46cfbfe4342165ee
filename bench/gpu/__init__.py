"""Everything that only a GPU can show, in minutes: README.md beside this file says what to call and what comes back."""
