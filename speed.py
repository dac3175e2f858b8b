from lib import *
torch.set_num_threads(2)
m,task,sp,bank,ev,meter=setup()
ev.prepare('search'); n=len(sp.units)
for bs in (1,2,4,8):
    task._batch_size=bs
    t=time.time(); ev((6,)*n,Fidelity('search',0,8)); print(bs,time.time()-t,flush=True)
    t=time.time(); ev((6,)*n,Fidelity('search',8,8)); print(bs,2048/(time.time()-t),'tok/s',flush=True)
t=time.time(); ev((1,)*n,Fidelity('search',8,8)); print('first rtn3',time.time()-t,flush=True)
t=time.time(); ev((1,)*n,Fidelity('search',16,8)); print('second rtn3',time.time()-t,flush=True)
