"""The operations of the flow head: one op, one reference, one specification (docs/math.md)."""
