//! Scenarios run on every KVM in reach, and compared.
