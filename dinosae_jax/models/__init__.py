"""Networks in Flax Linen; nothing outside calls anything of Linen but init and apply."""
