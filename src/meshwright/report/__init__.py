"""A run as one self-contained page and as tables in the terminal; what this machine offers (doctor)."""
