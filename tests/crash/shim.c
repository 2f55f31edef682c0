// What the system is asked to do with the files of one directory: recorded, refused, or cut off by SIGKILL.
//
// Loaded with LD_PRELOAD, so that calls of SQLite and of Python pass through alike. A call counts when its file lies
// under the watched directory. A counted call may be
//     recorded    kind, descriptor, offset, size and bytes, in the order in which the system took them
//     refused     with an errno, once, or from then on whatever takes room
//     the last    the process is killed in it
// A write that is refused or the last has written half of its bytes, where it is not within a sector, and not for EINTR.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { DESCRIPTORS = 4096, SECTOR = 512 };
enum Kind { OPEN, CLOSE, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, MKDIR, RMDIR, NOTE };
enum Fate { GOES, REFUSED, LAST };

struct Record {
  int32_t kind, fd;
  int64_t offset, size;  // then ``size`` bytes: what was written, or paths, each ended by a zero
};

static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static char watched[PATH_MAX];
static char* paths[DESCRIPTORS];  // of watched files that are open
static int trace = -1, refusal, lasting;
static long calls, refuse_at, kill_at;

// The function that this one stands before.
#define REAL(name)               \
  static __typeof__(&name) real; \
  if (real == NULL) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

// The mode that open takes where it may make a file.
#define MODE(flags, mode)                  \
  mode_t mode = 0;                         \
  if ((flags) & (O_CREAT | __O_TMPFILE)) { \
    va_list more;                          \
    va_start(more, flags);                 \
    mode = (mode_t)va_arg(more, unsigned); \
    va_end(more);                          \
  }

// --- what the laboratory says ---

void lab_watch(const char* directory) { snprintf(watched, sizeof watched, "%s", directory); }

void lab_record(int fd) { trace = fd; }

void lab_refuse(long nth, int error, int from_then_on) {
  calls = 0, refuse_at = nth, refusal = error, lasting = from_then_on;
}

void lab_kill(long nth) { calls = 0, kill_at = nth; }

long lab_calls(void) { return calls; }

// --- a call ---

static void put(const void* data, size_t size) {
  REAL(write);
  for (const char* at = data; size > 0;) {
    ssize_t done = real(trace, at, size);
    if (done <= 0) abort();
    at += done, size -= (size_t)done;
  }
}

static void record(enum Kind kind, int fd, int64_t offset, const void* data, size_t size) {
  if (trace < 0) return;
  struct Record head = {(int32_t)kind, fd, offset, (int64_t)size};
  put(&head, sizeof head);
  put(data, size);
}

void lab_note(long number) { record(NOTE, -1, number, NULL, 0); }

static enum Fate fate(int takes_room) {
  ++calls;
  if (calls == kill_at) return LAST;
  return refuse_at > 0 && (calls == refuse_at || (lasting && takes_room && calls > refuse_at)) ? REFUSED : GOES;
}

// For a call that does all of its work or none of it: shall it fail?
static int stopped(int takes_room) {
  enum Fate one = fate(takes_room);
  if (one == LAST) kill(getpid(), SIGKILL);
  if (one == REFUSED) errno = refusal;
  return one == REFUSED;
}

static int known(int fd) { return fd >= 0 && fd < DESCRIPTORS && paths[fd] != NULL; }

static int inside(const char* path) {
  size_t length = strlen(watched);
  return length > 0 && strncmp(path, watched, length) == 0 && (path[length] == '/' || path[length] == 0);
}

// The path from the root; it is ``path`` or lies in ``space``.
static const char* whole(int folder, const char* path, char space[PATH_MAX]) {
  if (path[0] == '/' || !known(folder)) return path;
  if (snprintf(space, PATH_MAX, "%s/%s", paths[folder], path) >= PATH_MAX) abort();
  return space;
}

// Runs ``call``, whose result is below 0 where it fails, with the records in its order.
#define TURN(call)                \
  pthread_mutex_lock(&mutex);     \
  __typeof__(call) result = call; \
  pthread_mutex_unlock(&mutex);   \
  return result

// --- files ---

static int open_inside(int folder, const char* name, const char* path, int flags, mode_t mode) {
  REAL(openat64);
  int fd = stopped(flags & O_CREAT) ? -1 : real(folder, name, flags, mode);
  if (fd < 0) return fd;
  if (fd >= DESCRIPTORS) abort();
  free(paths[fd]);
  paths[fd] = strdup(path);
  record(OPEN, fd, flags, path, strlen(path) + 1);
  return fd;
}

static int open_any(int folder, const char* name, int flags, mode_t mode) {
  REAL(openat64);
  char space[PATH_MAX];
  const char* path = whole(folder, name, space);
  if (!inside(path)) return real(folder, name, flags, mode);
  TURN(open_inside(folder, name, path, flags, mode));
}

int openat64(int folder, const char* path, int flags, ...) {
  MODE(flags, mode);
  return open_any(folder, path, flags, mode);
}

int openat(int folder, const char* path, int flags, ...) {
  MODE(flags, mode);
  return open_any(folder, path, flags, mode);
}

int open64(const char* path, int flags, ...) {
  MODE(flags, mode);
  return open_any(AT_FDCWD, path, flags, mode);
}

int open(const char* path, int flags, ...) {
  MODE(flags, mode);
  return open_any(AT_FDCWD, path, flags, mode);
}

int close(int fd) {
  REAL(close);
  if (!known(fd)) return real(fd);
  pthread_mutex_lock(&mutex);
  free(paths[fd]);
  paths[fd] = NULL;
  record(CLOSE, fd, 0, NULL, 0);
  int result = real(fd);
  pthread_mutex_unlock(&mutex);
  return result;
}

static ssize_t write_inside(int fd, const void* data, size_t size, off64_t offset) {
  REAL(pwrite64);
  enum Fate one = fate(1);
  int torn = size > SECTOR && !(one == REFUSED && refusal == EINTR);
  size_t part = one == GOES ? size : torn ? size / 2 : 0;
  ssize_t done = part > 0 ? real(fd, data, part, offset) : 0;
  if (one == LAST) kill(getpid(), SIGKILL);
  if (done > 0) record(WRITE, fd, offset, data, (size_t)done);
  if (one != REFUSED) return done;
  errno = refusal;
  return -1;
}

static ssize_t append_inside(int fd, const void* data, size_t size) {
  off64_t offset = lseek64(fd, 0, SEEK_CUR);
  ssize_t done = write_inside(fd, data, size, offset);
  if (done > 0) lseek64(fd, offset + done, SEEK_SET);
  return done;
}

ssize_t write(int fd, const void* data, size_t size) {
  REAL(write);
  if (!known(fd)) return real(fd, data, size);
  TURN(append_inside(fd, data, size));
}

ssize_t pwrite64(int fd, const void* data, size_t size, off64_t offset) {
  REAL(pwrite64);
  if (!known(fd)) return real(fd, data, size, offset);
  TURN(write_inside(fd, data, size, offset));
}

ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) { return pwrite64(fd, data, size, offset); }

static int truncate_inside(int fd, off64_t size) {
  REAL(ftruncate64);
  int result = stopped(1) ? -1 : real(fd, size);
  if (result == 0) record(TRUNCATE, fd, size, NULL, 0);
  return result;
}

int ftruncate64(int fd, off64_t size) {
  REAL(ftruncate64);
  if (!known(fd)) return real(fd, size);
  TURN(truncate_inside(fd, size));
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

static int sync_inside(int fd, int (*real)(int)) {
  int result = stopped(1) ? -1 : real(fd);
  if (result == 0) record(SYNC, fd, 0, NULL, 0);
  return result;
}

int fsync(int fd) {
  REAL(fsync);
  if (!known(fd)) return real(fd);
  TURN(sync_inside(fd, real));
}

int fdatasync(int fd) {
  REAL(fdatasync);
  if (!known(fd)) return real(fd);
  TURN(sync_inside(fd, real));
}

// A file that grows by these would grow without a record.
int fallocate64(int fd, int mode, off64_t offset, off64_t size) {
  REAL(fallocate64);
  if (known(fd)) abort();
  return real(fd, mode, offset, size);
}

int posix_fallocate64(int fd, off64_t offset, off64_t size) {
  REAL(posix_fallocate64);
  if (known(fd)) abort();
  return real(fd, offset, size);
}

// --- reads: counted, not recorded ---

static int unreadable(int fd) {
  if (!known(fd)) return 0;
  TURN(stopped(0));
}

ssize_t read(int fd, void* data, size_t size) {
  REAL(read);
  return unreadable(fd) ? -1 : real(fd, data, size);
}

ssize_t pread64(int fd, void* data, size_t size, off64_t offset) {
  REAL(pread64);
  return unreadable(fd) ? -1 : real(fd, data, size, offset);
}

ssize_t pread(int fd, void* data, size_t size, off_t offset) { return pread64(fd, data, size, offset); }

ssize_t preadv64(int fd, const struct iovec* parts, int count, off64_t offset) {
  REAL(preadv64);
  return unreadable(fd) ? -1 : real(fd, parts, count, offset);
}

ssize_t preadv(int fd, const struct iovec* parts, int count, off_t offset) {
  return preadv64(fd, parts, count, offset);
}

// --- directories ---

static int rename_inside(const char* from, const char* to) {
  REAL(rename);
  char both[2 * PATH_MAX];
  int size = snprintf(both, sizeof both, "%s%c%s", from, 0, to) + 1;
  int result = stopped(1) ? -1 : real(from, to);
  if (result == 0) record(RENAME, -1, 0, both, (size_t)size);
  return result;
}

int rename(const char* from, const char* to) {
  REAL(rename);
  if (!inside(from)) return real(from, to);
  TURN(rename_inside(from, to));
}

static int unlink_inside(int folder, const char* name, const char* path, int flags) {
  REAL(unlinkat);
  int result = stopped(0) ? -1 : real(folder, name, flags);
  if (result == 0) record(flags & AT_REMOVEDIR ? RMDIR : UNLINK, -1, 0, path, strlen(path) + 1);
  return result;
}

int unlinkat(int folder, const char* name, int flags) {
  REAL(unlinkat);
  char space[PATH_MAX];
  const char* path = whole(folder, name, space);
  if (!inside(path)) return real(folder, name, flags);
  TURN(unlink_inside(folder, name, path, flags));
}

int unlink(const char* path) { return unlinkat(AT_FDCWD, path, 0); }

int rmdir(const char* path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

static int mkdir_inside(const char* path, mode_t mode) {
  REAL(mkdir);
  int result = stopped(1) ? -1 : real(path, mode);
  if (result == 0) record(MKDIR, -1, 0, path, strlen(path) + 1);
  return result;
}

int mkdir(const char* path, mode_t mode) {
  REAL(mkdir);
  if (!inside(path)) return real(path, mode);
  TURN(mkdir_inside(path, mode));
}
