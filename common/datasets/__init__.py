"""What one field's data layout means: one module per layout."""
