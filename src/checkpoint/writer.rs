//! Bounded shards, index, write-then-rename.
