//! Random sequences of operations against a model: a page's content is what was last written there, errors come where the
//! model has no memory, and the counts of mappings and faults stay within what the operations allow.

mod guest;

use guest::*;
use premap_address::{Gpa, PAGE_SIZE};
use premap_kvm::Vcpu;
use premap_kvm::abi::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
use premap_softkvm::Profile;
use proptest::prelude::*;
use rustix::mm::Advice;

/// Pages of guest-physical memory that the sequences move about in, from 0 on.
const SPACE: u64 = 48;
/// Pages of host memory behind each slot's number: each number has a part of its own.
const HOST: u64 = PAGES as u64;
const PAGES: usize = 16;
const SLOTS: u32 = 3;

#[derive(Clone, Copy, Debug)]
enum Action {
    /// Makes, moves or re-flags a slot of the first `pages` of its number's memory.
    Set {
        slot: u32,
        at: u64,
        pages: u64,
        flags: u32,
    },
    Delete {
        slot: u32,
    },
    PreFault {
        vcpu: usize,
        at: u64,
        pages: u64,
    },
    Read {
        vcpu: usize,
        at: u64,
    },
    Write {
        vcpu: usize,
        at: u64,
        value: u64,
    },
    /// Throws host pages of a number away.
    Discard {
        slot: u32,
        first: u64,
        pages: u64,
    },
    /// The VMM makes host pages present behind the VM's back.
    Populate {
        slot: u32,
        first: u64,
        pages: u64,
    },
    TakeLog {
        slot: u32,
    },
}

fn action() -> impl Strategy<Value = Action> {
    let (slot, vcpu, at) = (0..SLOTS, 0..2_usize, 0..SPACE);
    let flags = prop_oneof![4 => Just(0), 1 => Just(KVM_MEM_LOG_DIRTY_PAGES), 1 => Just(KVM_MEM_READONLY)];
    let part = (0..HOST).prop_flat_map(|first| (Just(first), 1..=HOST - first));
    prop_oneof![
        3 => (slot.clone(), at.clone(), 1..=HOST, flags)
            .prop_map(|(slot, at, pages, flags)| Action::Set { slot, at, pages, flags }),
        1 => slot.clone().prop_map(|slot| Action::Delete { slot }),
        4 => (vcpu.clone(), at.clone(), 1..=SPACE)
            .prop_map(|(vcpu, at, pages)| Action::PreFault { vcpu, at, pages }),
        4 => (vcpu.clone(), at.clone()).prop_map(|(vcpu, at)| Action::Read { vcpu, at }),
        6 => (vcpu, at, 1..=u64::MAX).prop_map(|(vcpu, at, value)| Action::Write { vcpu, at, value }),
        1 => (slot.clone(), part.clone())
            .prop_map(|(slot, (first, pages))| Action::Discard { slot, first, pages }),
        1 => (slot.clone(), part).prop_map(|(slot, (first, pages))| Action::Populate { slot, first, pages }),
        1 => slot.prop_map(|slot| Action::TakeLog { slot }),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct ModelSlot {
    at: u64,
    pages: u64,
    flags: u32,
}

/// What is known of the VM: its slots, and the content of each number's host memory.
#[derive(Default)]
struct Model {
    slots: [Option<ModelSlot>; SLOTS as usize],
    content: [[u64; PAGES]; SLOTS as usize],
    /// Pages written since the log was taken, at least.
    dirty: [[bool; PAGES]; SLOTS as usize],
}

impl Model {
    /// The slot's number and the page in it.
    fn find(&self, at: u64) -> Option<(usize, usize)> {
        self.slots.iter().enumerate().find_map(|(number, slot)| {
            let slot = (*slot)?;
            let page = at.checked_sub(slot.at).filter(|page| *page < slot.pages)?;
            Some((number, usize::try_from(page).ok()?))
        })
    }

    /// Whether a slot may be set so.
    fn allows(&self, number: usize, new: ModelSlot) -> bool {
        let fits = self.slots[number]
            .is_none_or(|old| old.pages == new.pages && (old.flags ^ new.flags) & KVM_MEM_READONLY == 0);
        let overlaps = |(other, slot): (usize, &Option<ModelSlot>)| {
            other != number
                && slot.is_some_and(|slot| slot.at < new.at + new.pages && new.at < slot.at + slot.pages)
        };
        fits && !self.slots.iter().enumerate().any(overlaps)
    }
}

/// The page's place in the model's arrays.
fn index(page: u64) -> usize {
    usize::try_from(page).unwrap_or(usize::MAX)
}

fn gpa(page: u64) -> Gpa {
    Gpa::new(page * PAGE_SIZE)
}

/// Runs a sequence on a VM of this profile.
fn run(profile: Profile, quirk: bool, actions: &[Action]) -> Result<(), TestCaseError> {
    let memories: Vec<Memory> = (0..SLOTS).map(|_| Memory::anonymous(HOST)).collect();
    let vm = vm(profile);
    if !quirk {
        disable_slot_zap_quirk(&vm);
    }
    let new_vcpu = |id| vm.create_vcpu(id).map_err(|errno| TestCaseError::fail(errno.to_string()));
    let mut vcpus = [new_vcpu(0)?, new_vcpu(1)?];
    let mut model = Model::default();
    for action in actions {
        match *action {
            Action::Set { slot, at, pages, flags } => {
                let number = slot as usize;
                let new = ModelSlot { at, pages, flags };
                let result = set(&vm, &region(slot, flags, gpa(at).raw(), memories[number].hva(), pages));
                prop_assert_eq!(result.is_ok(), model.allows(number, new), "{:?}", result);
                if result.is_ok() {
                    let logged = |slot: Option<ModelSlot>| {
                        slot.is_some_and(|slot| slot.flags & KVM_MEM_LOG_DIRTY_PAGES != 0)
                    };
                    if !(logged(model.slots[number]) && logged(Some(new))) {
                        model.dirty[number] = Default::default();
                    }
                    model.slots[number] = Some(new);
                }
            }
            Action::Delete { slot } => {
                let result = set(&vm, &region(slot, 0, 0, memories[0].hva(), 0));
                prop_assert_eq!(result.is_ok(), model.slots[slot as usize].take().is_some());
            }
            Action::PreFault { vcpu, at, pages } => {
                // In 6.12 a stale root would have it spin; what a VMM does there is to drop the root.
                vcpus[vcpu].renew_root().expect("a software root can always be renewed");
                let backed = (at..at + pages).take_while(|page| model.find(*page).is_some()).count() as u64;
                let (result, next, left) = pre_fault(&mut vcpus[vcpu], gpa(at).raw(), pages);
                prop_assert_eq!(result.is_ok(), backed > 0);
                prop_assert_eq!((next, left), (gpa(at + backed).raw(), pages - backed));
            }
            Action::Read { vcpu, at } => {
                let expected = model.find(at).map(|(number, page)| model.content[number][page]);
                prop_assert_eq!(vcpus[vcpu].read(gpa(at)).ok(), expected);
            }
            Action::Write { vcpu, at, value } => {
                let writable = model.find(at).filter(|(number, _)| {
                    model.slots[*number].is_some_and(|slot| slot.flags & KVM_MEM_READONLY == 0)
                });
                prop_assert_eq!(vcpus[vcpu].write(gpa(at), value).is_ok(), writable.is_some());
                if let Some((number, page)) = writable {
                    model.content[number][page] = value;
                    model.dirty[number][page] = true;
                }
            }
            Action::Discard { slot, first, pages } => {
                let memory = &memories[slot as usize];
                vm.notifier().invalidate(&memory.range(first..first + pages), || {
                    memory.advise(first..first + pages, Advice::LinuxDontNeed);
                });
                for page in first..first + pages {
                    model.content[slot as usize][index(page)] = 0;
                }
            }
            Action::Populate { slot, first, pages } => {
                memories[slot as usize].populate_write(first..first + pages);
            }
            Action::TakeLog { slot } => {
                let number = slot as usize;
                let known = model.slots[number].filter(|slot| slot.flags & KVM_MEM_LOG_DIRTY_PAGES != 0);
                let log = dirty_log(&vm, slot, known.map_or(HOST, |slot| slot.pages));
                prop_assert_eq!(log.is_ok(), known.is_some());
                let log = log.unwrap_or_default();
                for page in 0..known.map_or(0, |slot| slot.pages) {
                    let written = std::mem::take(&mut model.dirty[number][index(page)]);
                    prop_assert!(!written || log.contains(&page), "the log lacks page {page}");
                }
            }
        }
        let pages: u64 = model.slots.iter().flatten().map(|slot| slot.pages).sum();
        prop_assert!(mapped(&vm)[0] <= pages, "more is mapped than there are pages");
    }
    for vcpu in &vcpus {
        let [taken, fixed, spurious, emulate] =
            ["pf_taken", "pf_fixed", "pf_spurious", "pf_emulate"].map(|name| stat(vcpu, name));
        prop_assert!(fixed + spurious + emulate <= taken);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(150) })]

    #[test]
    fn every_sequence_agrees_with_the_model(
        profile in prop::sample::select(Profile::ALL.to_vec()),
        quirk in any::<bool>(),
        actions in prop::collection::vec(action(), 1..80),
    ) {
        run(profile, quirk, &actions)?;
    }
}
