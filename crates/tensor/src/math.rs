//! Fast elementary functions.
