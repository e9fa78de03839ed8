//! The search for an order.
//!
//! An operation takes effect in one or more moments between its beginning and its end. Moments of all threads are put in
//! an order, each thread's operations one after the other and none before all have ended that ended before it began, in
//! which a sequential machine tells each operation what it was told.

use std::collections::HashSet;
use std::fmt::Debug;
use std::hash::Hash;

/// An operation that was done, what it was told, and when it was under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event<O, T> {
    pub(crate) op: O,
    pub(crate) told: T,
    pub(crate) began: u64,
    pub(crate) ended: u64,
}

/// What a moment of an operation leads to.
pub(crate) enum Next<P, T> {
    /// More is to come.
    Goes(P),
    /// It is done, and was told this.
    Ends(T),
}

/// What does operations moment by moment.
pub(crate) trait Machine {
    type Op: Clone + Debug;
    type Told: Clone + Debug + PartialEq;
    type State: Clone + Eq + Hash;
    /// How far an operation is.
    type Progress: Clone + Eq + Hash + Default;

    /// Does an operation's next moment; `None` if it has to wait for another thread.
    fn moment(
        state: &mut Self::State,
        thread: usize,
        op: &Self::Op,
        progress: &Self::Progress,
    ) -> Option<Next<Self::Progress, Self::Told>>;
}

/// What each thread did, in its order.
pub(crate) type History<M> = Vec<Vec<Event<<M as Machine>::Op, <M as Machine>::Told>>>;

/// How far each thread is: its event and the progress of that.
type Position<M> = Vec<(usize, <M as Machine>::Progress)>;

/// Whether some order explains the history.
pub(crate) fn explains<M: Machine>(history: &History<M>, start: M::State) -> bool {
    let mut seen: HashSet<(M::State, Position<M>)> = HashSet::new();
    let mut open = Vec::from([(start, vec![(0, M::Progress::default()); history.len()])]);
    while let Some((state, position)) = open.pop() {
        let current = |thread: usize| history[thread].get(position[thread].0);
        let Some(first_end) = (0..history.len()).filter_map(current).map(|event| event.ended).min() else {
            return true;
        };
        for thread in 0..history.len() {
            let Some(event) = current(thread).filter(|event| event.began <= first_end) else { continue };
            let (at, progress) = &position[thread];
            let mut state = state.clone();
            let next = match M::moment(&mut state, thread, &event.op, progress) {
                Some(Next::Goes(progress)) => (*at, progress),
                Some(Next::Ends(told)) if told == event.told => (at + 1, M::Progress::default()),
                _ => continue,
            };
            let mut position = position.clone();
            position[thread] = next;
            if seen.insert((state.clone(), position.clone())) {
                open.push((state, position));
            }
        }
    }
    false
}

/// How many operations began while one of another thread was under way.
pub(crate) fn meetings<O, T>(history: &[Vec<Event<O, T>>]) -> usize {
    let all = || history.iter().flatten();
    all().filter(|a| all().any(|b| b.began < a.began && a.began < b.ended)).count()
}

/// The history in the order in which it began, a line each.
pub(crate) fn show<O: Debug, T: Debug>(history: &[Vec<Event<O, T>>]) -> String {
    let thread = |(thread, events): (usize, &Vec<Event<O, T>>)| {
        let line = |event: &Event<O, T>| {
            let Event { op, told, began, ended } = event;
            (*began, format!("{began:4}-{ended:<4} thread {thread}: {op:?} -> {told:?}"))
        };
        events.iter().map(line).collect::<Vec<_>>()
    };
    let mut lines: Vec<_> = history.iter().enumerate().flat_map(thread).collect();
    lines.sort();
    lines.into_iter().map(|(_, line)| line + "\n").collect()
}
