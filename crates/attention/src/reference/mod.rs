//! The operator in float64, written to be read beside the equations.
