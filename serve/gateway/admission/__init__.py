"""Which requests are sent to which engine, when, and with how many members."""
