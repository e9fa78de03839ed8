//! Concurrent second-stage page tables for hypervisors.
