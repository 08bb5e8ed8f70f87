"""Pure numpy: rows of records to the tensor a trainer wants."""
