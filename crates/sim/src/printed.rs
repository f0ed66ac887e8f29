//! Values of the protocol, which know no hash, in states that must have one.

use std::{
    fmt::{self, Debug, Write},
    hash::{Hash, Hasher},
    ops::{Deref, DerefMut},
};

/// Hashed by what it looks like.
#[derive(Clone, Debug)]
pub struct Printed<T>(pub T);

impl<T: Debug> Hash for Printed<T> {
    fn hash<H: Hasher>(&self, to: &mut H) {
        struct Into<'a, H>(&'a mut H);
        impl<H: Hasher> Write for Into<'_, H> {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                self.0.write(text.as_bytes());
                Ok(())
            }
        }
        // Writing into a hasher cannot fail.
        let _ = write!(Into(to), "{:?}", self.0);
    }
}

impl<T> Deref for Printed<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Printed<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}
