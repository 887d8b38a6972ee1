//! What only an embedded store has.
