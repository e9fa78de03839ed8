//! A KVM in user space: memslots, fault path, pre-faulting and statistics on real page tables.
