//! `config.json`, kept whole, with typed reads that name the key.
