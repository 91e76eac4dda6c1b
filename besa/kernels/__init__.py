"""Fast paths in C++, each beside a plain torch reference of the same signature."""
