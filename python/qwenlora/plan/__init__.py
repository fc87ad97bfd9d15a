"""Plans, as Rust tells them."""
