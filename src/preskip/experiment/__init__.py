"""One experiment: what is asked for, prepared, trained, scored and compared."""
