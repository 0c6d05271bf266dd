//! The front, over real sockets: before an engine that writes what the test says, and before the
//! real one on a tiny model.

mod client;
mod fake;
mod hostile;
mod real;
mod routes;
