"""Stage 3: parameters that are whole only while they are used."""
