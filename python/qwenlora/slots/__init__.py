"""The only folder that writes to layers."""
