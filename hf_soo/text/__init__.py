"""Text of any common layout, read as documents and cleaned; what is made of it is the domains' own."""
