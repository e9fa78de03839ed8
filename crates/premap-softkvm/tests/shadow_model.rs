//! Random sequences on every MMU: modes, touches, tables that guests rewrite, host memory that goes, shadow pages that are
//! evicted. What a guest reads is what a plain model says, in every mode, and what it may not touch it never reaches.
#![expect(clippy::unwrap_used, reason = "a test that can't set up its machine fails")]

mod guest;

use guest::tables::{GuestTables, READ_ONLY, WRITABLE};
use guest::*;
use premap_address::{Gpa, PAGE_SIZE};
use premap_kvm::Vcpu;
use premap_kvm::abi::KVM_MEM_LOG_DIRTY_PAGES;
use premap_softkvm::{CpuMode, GuestFault, Profile, SoftConfig, SoftVcpu, SoftVm, Tdp};
use proptest::prelude::*;
use rustix::mm::Advice;

const GPA: u64 = 1 << 32;
const PAGES: usize = 8;
/// Pages under the guest's tables, and the one at which those show the leaf table itself.
const ADDRESSES: usize = 12;
const WINDOW: u64 = 500;
const SLOTS: [u32; 2] = [0, 1 << 16];

#[derive(Clone, Copy, Debug)]
enum Action {
    Enter {
        vcpu: usize,
        mode: usize,
    },
    Reset {
        vcpu: usize,
    },
    Read {
        vcpu: usize,
        page: usize,
    },
    Write {
        vcpu: usize,
        page: usize,
        value: u64,
    },
    /// A guest lets an address lead elsewhere.
    Point {
        vcpu: usize,
        address: usize,
        entry: Option<(usize, bool)>,
    },
    PreFault {
        vcpu: usize,
        page: usize,
    },
    /// The host throws a page away.
    Discard {
        space: usize,
        page: usize,
    },
    Populate {
        space: usize,
        page: usize,
    },
    /// A slot is deleted or made.
    Toggle {
        space: usize,
    },
    TakeLog {
        space: usize,
    },
    Shrink {
        pages: u64,
    },
    Renew {
        vcpu: usize,
    },
}

fn action() -> impl Strategy<Value = Action> {
    let (vcpu, page, space) = (0..2_usize, 0..ADDRESSES, 0..2_usize);
    let entry = prop_oneof![1 => Just(None), 4 => (0..PAGES, any::<bool>()).prop_map(Some)];
    let host = (space.clone(), 0..PAGES);
    prop_oneof![
        3 => (vcpu.clone(), 0..6_usize).prop_map(|(vcpu, mode)| Action::Enter { vcpu, mode }),
        1 => vcpu.clone().prop_map(|vcpu| Action::Reset { vcpu }),
        8 => (vcpu.clone(), page.clone()).prop_map(|(vcpu, page)| Action::Read { vcpu, page }),
        8 => (vcpu.clone(), page.clone(), 1..=u64::MAX)
            .prop_map(|(vcpu, page, value)| Action::Write { vcpu, page, value }),
        5 => (vcpu.clone(), page.clone(), entry)
            .prop_map(|(vcpu, address, entry)| Action::Point { vcpu, address, entry }),
        3 => (vcpu.clone(), page).prop_map(|(vcpu, page)| Action::PreFault { vcpu, page }),
        2 => host.clone().prop_map(|(space, page)| Action::Discard { space, page }),
        1 => host.prop_map(|(space, page)| Action::Populate { space, page }),
        1 => space.clone().prop_map(|space| Action::Toggle { space }),
        1 => space.prop_map(|space| Action::TakeLog { space }),
        1 => (1..8_u64).prop_map(|pages| Action::Shrink { pages }),
        1 => vcpu.prop_map(|vcpu| Action::Renew { vcpu }),
    ]
}

/// What an address leads to, by the model.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    /// A page of a space, and whether tables let it be written.
    Page(usize, usize, bool),
    /// Tables say no.
    Nowhere,
}

struct Model {
    entries: [Option<(usize, bool)>; ADDRESSES],
    content: [[u64; PAGES]; 2],
    /// Pages written since the log was taken, at least.
    dirty: [[bool; PAGES]; 2],
    attached: [bool; 2],
}

struct Machine {
    vm: SoftVm,
    vcpus: [SoftVcpu; 2],
    memories: [Memory; 2],
    tables: GuestTables,
    tdp: Tdp,
    model: Model,
}

impl Machine {
    fn new(profile: Profile, tdp: Tdp, quirk: bool) -> Self {
        let vm = vm_with(SoftConfig { profile, tdp, ..SoftConfig::default() });
        if !quirk {
            disable_slot_zap_quirk(&vm);
        }
        let memories = [(); 2].map(|()| Memory::anonymous(PAGES as u64));
        for (slot, memory) in SLOTS.into_iter().zip(&memories) {
            attach(&vm, slot, KVM_MEM_LOG_DIRTY_PAGES, GPA, memory);
        }
        let tables = GuestTables::new(&vm, 1, 0, 1);
        tables.attach(&vm, SLOTS[1] + 1);
        tables.set(WINDOW, tables.entry(0).raw(), WRITABLE);
        let vcpus = [0, 1].map(|id| vm.create_vcpu(id).unwrap());
        let model = Model {
            entries: [None; ADDRESSES],
            content: Default::default(),
            dirty: Default::default(),
            attached: [true; 2],
        };
        Self { vm, vcpus, memories, tables, tdp, model }
    }

    fn mode(&self, index: usize) -> CpuMode {
        let root = self.tables.root();
        [
            CpuMode::PagingOff,
            CpuMode::Paging { cr3: root },
            CpuMode::SystemManagement { cr3: None },
            CpuMode::SystemManagement { cr3: Some(root) },
            CpuMode::NestedPaging { ncr3: root },
            CpuMode::NestedShadow { cr3: root },
        ][index]
    }

    /// Whether a vCPU's addresses are under tables, and which space it sees.
    fn view(&self, vcpu: usize) -> (bool, usize) {
        let (shadowed, space) = match self.vcpus[vcpu].mode() {
            CpuMode::PagingOff => (false, 0),
            CpuMode::Paging { .. } | CpuMode::NestedShadow { .. } => (self.tdp == Tdp::Off, 0),
            CpuMode::SystemManagement { cr3 } => (self.tdp == Tdp::Off && cr3.is_some(), 1),
            CpuMode::NestedPaging { .. } => (true, 0),
        };
        (shadowed, space)
    }

    /// Where a vCPU's page lies, and what the model says of it.
    fn place(&self, vcpu: usize, page: usize) -> (Gpa, Place) {
        let (shadowed, space) = self.view(vcpu);
        if !shadowed {
            let page = page % PAGES;
            return (Gpa::new(GPA + page as u64 * PAGE_SIZE), Place::Page(space, page, true));
        }
        let place = match self.model.entries[page] {
            Some((to, writable)) => Place::Page(space, to, writable),
            None => Place::Nowhere,
        };
        (self.tables.address(page as u64), place)
    }

    fn check<T: std::fmt::Debug + PartialEq>(
        &self,
        (place, write): (Place, bool),
        result: Result<T, GuestFault>,
        expected: T,
    ) -> Result<(), TestCaseError> {
        match place {
            Place::Nowhere => prop_assert!(matches!(result, Err(GuestFault::Guest { .. })), "{result:?}"),
            Place::Page(_, _, false) if write => {
                prop_assert!(matches!(result, Err(GuestFault::Guest { .. })), "{result:?}");
            }
            Place::Page(space, _, _) if !self.model.attached[space] => {
                prop_assert!(matches!(result, Err(GuestFault::Mmio { .. })), "{result:?}");
            }
            Place::Page(..) => prop_assert_eq!(result, Ok(expected)),
        }
        Ok(())
    }

    fn run(&mut self, action: Action) -> Result<(), TestCaseError> {
        match action {
            Action::Enter { vcpu, mode } => {
                let mode = self.mode(mode);
                let impossible = self.tdp == Tdp::Off && matches!(mode, CpuMode::NestedPaging { .. });
                prop_assert_eq!(self.vcpus[vcpu].enter(mode).is_err(), impossible);
            }
            Action::Reset { vcpu } => self.vcpus[vcpu].reset(),
            Action::Read { vcpu, page } => {
                let (address, place) = self.place(vcpu, page);
                let expected = match place {
                    Place::Page(space, page, _) => self.model.content[space][page],
                    Place::Nowhere => 0,
                };
                let result = self.vcpus[vcpu].read(address);
                self.check((place, false), result, expected)?;
            }
            Action::Write { vcpu, page, value } => {
                let (address, place) = self.place(vcpu, page);
                let result = self.vcpus[vcpu].write(address, value);
                self.check((place, true), result, ())?;
                if let (Place::Page(space, page, _), Ok(())) = (place, result) {
                    self.model.content[space][page] = value;
                    self.model.dirty[space][page] = true;
                }
            }
            Action::Point { vcpu, address, entry } => {
                let raw = entry.map_or(0, |(page, writable)| {
                    (GPA + page as u64 * PAGE_SIZE) | if writable { WRITABLE } else { READ_ONLY }
                });
                let at = if self.view(vcpu).0 {
                    self.tables.address(WINDOW).wrapping_add(address as u64 * 8)
                } else {
                    self.tables.entry(address as u64)
                };
                prop_assert_eq!(self.vcpus[vcpu].write(at, raw), Ok(()));
                self.model.entries[address] = entry;
            }
            Action::PreFault { vcpu, page } => {
                // In 6.12 a stale root would have it spin; what a VMM does there is to drop the root.
                self.vcpus[vcpu].renew_root().unwrap();
                let _ = pre_fault(&mut self.vcpus[vcpu], GPA + (page % PAGES) as u64 * PAGE_SIZE, 4);
            }
            Action::Discard { space, page } => {
                let (memory, page) = (&self.memories[space], page as u64);
                self.vm.notifier().invalidate(&memory.range(page..page + 1), || {
                    memory.advise(page..page + 1, Advice::LinuxDontNeed);
                });
                self.model.content[space][usize::try_from(page).unwrap()] = 0;
            }
            Action::Populate { space, page } => {
                self.memories[space].populate_write(page as u64..page as u64 + 1);
            }
            Action::Toggle { space } => {
                if self.model.attached[space] {
                    detach(&self.vm, SLOTS[space]);
                } else {
                    attach(&self.vm, SLOTS[space], KVM_MEM_LOG_DIRTY_PAGES, GPA, &self.memories[space]);
                    self.model.dirty[space] = Default::default();
                }
                self.model.attached[space] ^= true;
            }
            Action::TakeLog { space } => {
                if self.model.attached[space] {
                    let log = dirty_log(&self.vm, SLOTS[space], PAGES as u64).unwrap();
                    for (page, written) in self.model.dirty[space].iter_mut().enumerate() {
                        prop_assert!(!*written || log.contains(&(page as u64)), "the log lacks page {page}");
                        *written = false;
                    }
                }
            }
            Action::Shrink { pages } => {
                self.vm.shrink_mmu(pages);
            }
            Action::Renew { vcpu } => self.vcpus[vcpu].renew_root().unwrap(),
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn every_mode_of_every_mmu_agrees_with_the_model(
        profile in prop::sample::select(Profile::ALL.to_vec()),
        tdp in prop::sample::select(vec![Tdp::On, Tdp::WithoutTdpMmu, Tdp::Off]),
        quirk in any::<bool>(),
        actions in prop::collection::vec(action(), 1..120),
    ) {
        let mut machine = Machine::new(profile, tdp, quirk);
        for action in actions {
            machine.run(action)?;
        }
        for (space, memory) in machine.memories.iter().enumerate() {
            for (page, expected) in (0..).zip(machine.model.content[space]) {
                prop_assert_eq!(memory.word(page, 0), expected);
            }
        }
    }
}
