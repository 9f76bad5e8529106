"""Reports: they take records and print them; torch is not imported here."""
