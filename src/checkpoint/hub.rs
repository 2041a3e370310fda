//! Models and data sets by hub id.
