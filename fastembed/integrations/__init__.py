"""How fastembed meets models of other libraries: what it recognises in them, and how that is replaced and restored."""
