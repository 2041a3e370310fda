//! load → plan → swap → transfer → recover → merge → export → verify.
