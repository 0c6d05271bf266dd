//! A sequence of launches, recorded once and started with one call.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::sys;

use crate::arena::Arena;
use crate::error::check;
use crate::gpu::{lock, this_thread};
use crate::{Error, Gpu, Result};

/// Launches recorded by [`Gpu::capture`]. They read and write the same addresses every time;
/// memory that was allocated during the capture belongs to the graph.
pub struct Graph {
    gpu: Gpu,
    exec: sys::CUgraphExec,
    nodes: usize,
    /// Freed after `exec`, since fields drop in order after `Graph::drop`.
    _arena: Arc<Arena>,
}

// SAFETY: the handle may be used from any thread once the context is current there.
unsafe impl Send for Graph {}
// SAFETY: launching is ordered by the stream, whoever asks.
unsafe impl Sync for Graph {}

impl Gpu {
    /// Records what `work` asks of this device instead of doing it. Within `work` nothing may be
    /// read or written by the host; other threads that use this device get an error. Buffers from
    /// before that `work` uses must outlive the graph (one dropped inside `work` is kept).
    pub fn capture<R, E: From<Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<R, E>,
    ) -> std::result::Result<(Graph, R), E> {
        self.bind()?;
        let arena = Arc::new(Arena::new(self.clone()));
        {
            let mut current = lock(&self.0.arena);
            if current.is_some() {
                return Err(Error::Value("a graph is already being captured".into()).into());
            }
            // Relaxed: kernels may be loaded and memory allocated on the side meanwhile.
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
            // SAFETY: the stream is alive.
            check("cuStreamBeginCapture", unsafe {
                sys::cuStreamBeginCapture_v2(self.0.stream, mode)
            })?;
            *current = Some(arena.clone());
        }
        self.0.capturing.store(this_thread(), Ordering::Release);
        // Ends the capture when `work` panics, too.
        let ending = Ending { gpu: self };
        let outcome = work();
        let graph = ending.end();
        let value = outcome?;
        let graph = graph?;
        let (mut exec, mut nodes) = (std::ptr::null_mut(), 0);
        // SAFETY: the graph was just made by the driver and is destroyed here.
        let result = unsafe {
            sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut nodes);
            let result = sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0);
            sys::cuGraphDestroy(graph);
            result
        };
        check("cuGraphInstantiate", result)?;
        Ok((Graph { gpu: self.clone(), exec, nodes, _arena: arena }, value))
    }
}

struct Ending<'a> {
    gpu: &'a Gpu,
}

impl Ending<'_> {
    fn end(self) -> Result<sys::CUgraph> {
        let graph = self.stop();
        std::mem::forget(self);
        graph
    }

    fn stop(&self) -> Result<sys::CUgraph> {
        let mut graph = std::ptr::null_mut();
        let bound = self.gpu.make_current();
        // SAFETY: the stream is alive and being captured; on an error the graph stays null.
        let result = unsafe { sys::cuStreamEndCapture(self.gpu.0.stream, &mut graph) };
        self.gpu.0.capturing.store(0, Ordering::Release);
        let arena = lock(&self.gpu.0.arena).take();
        drop(arena);
        bound?;
        check("cuStreamEndCapture", result)?;
        Ok(graph)
    }
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if let Ok(graph) = self.stop() {
            // SAFETY: the graph was just made and nothing else knows it.
            unsafe { sys::cuGraphDestroy(graph) };
        }
    }
}

impl Graph {
    /// Does everything once more, in the stream's order.
    pub fn launch(&self) -> Result<()> {
        self.gpu.bind()?;
        // SAFETY: the instance is alive; its memory lives in the arena.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.exec, self.gpu.0.stream) })
    }

    /// How many launches, copies and fills it holds.
    pub fn nodes(&self) -> usize {
        self.nodes
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.gpu.make_current().is_ok() {
            // SAFETY: the driver keeps a running instance until it ends.
            unsafe { sys::cuGraphExecDestroy(self.exec) };
        }
    }
}
